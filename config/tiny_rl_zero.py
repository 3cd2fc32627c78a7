# RL-Zero of MiMo-tiny: the same recipe straight from the base model, with the plain text prompt.
from config.tiny_rl import *

init, out = "out/tiny/base", "out/tiny/rl_zero"
