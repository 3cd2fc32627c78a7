"""The same tokens of each source as in three_stages.py, in one mixture from the first step to the last."""
from paper.arms.three_stages import *

_total = sum(stage.tokens for stage in stages)
_mixture = {source: sum(stage.tokens * stage.mix.get(source, 0) for stage in stages) / _total
           for source in ("web", "maths", "code", "books", "synth")}
stages = [replace(stage, mix=_mixture) for stage in stages]
