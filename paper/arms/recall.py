"""A quarter of stages 1 and 2 are documents that repeat numbers; stage 3 reads more books and long probes."""
from dataclasses import replace

from config.tiny import *

_mixes = [dict(web=0.16, maths=0.36, code=0.14, books=0.09, recall=0.25),
         dict(web=0.15, maths=0.39, code=0.13, books=0.08, recall=0.25),
         dict(web=0.08, maths=0.40, code=0.14, books=0.28, synth=0.10)]
stages = [replace(stage, mix=mix) for stage, mix in zip(stages, _mixes, strict=True)]
mtp_stage = None
