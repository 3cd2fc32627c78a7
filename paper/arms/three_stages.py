"""Three stages that differ more than the demo's: general text first, then maths and code, then synthetic too."""
from dataclasses import replace

from config.tiny import *

_mixes = [dict(web=0.50, maths=0.20, code=0.10, books=0.20), dict(web=0.15, maths=0.50, code=0.25, books=0.10),
         dict(web=0.05, maths=0.45, code=0.20, books=0.10, synth=0.20)]
stages = [replace(stage, mix=mix) for stage, mix in zip(stages, _mixes, strict=True)]
mtp_stage = None
