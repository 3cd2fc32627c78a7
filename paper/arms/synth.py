"""A third of stage 3 is synthetic reasoning: 200,000 tokens; how often each is read, the size of the source decides."""
from dataclasses import replace

from config.tiny import *

stages = [*stages[:2], replace(stages[2], mix=dict(web=0.08, maths=0.35, code=0.12, books=0.12, synth=0.33))]
mtp_stage = None
