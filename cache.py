"""
The block manager of the engine's KV cache: which blocks of memory belong to which sequence (vLLM's paged attention,
arXiv 2309.06180; report 3.4 patches vLLM and leaves this part to it).

    blocks = BlockManager(n_blocks=2048, block=64)      # 131,072 tokens
    blocks.allocate("a", 300)                           # five blocks, or False if fewer are free
    blocks.allocate("b", 300, shared=blocks.tables["a"][:4])    # "b" reads four blocks of "a" and has one of its own
    blocks.append("a", 321)                             # a sixth block, for the token that five blocks cannot hold
    blocks.free("a")                                    # the shared blocks stay, because "b" still reads them

The memory is cut into blocks of 64 tokens. A sequence owns a table of blocks, and token p of it lies in block
table[p // 64]. Blocks are given out as a sequence grows, so a sequence never holds more than it has written, up to one
block. Nothing is reserved for the longest answer that a request allows: at 7B, with answers of 9k tokens on average and
30k at most, that would leave most of the memory unused (docs/engine.md has the numbers).

Sequences with one prompt, such as the 16 answers of a GRPO group, share the blocks in which the prompt lies. A block
that has more than one reader is never written: the engine gives each sequence its own copy of the block that it will
write next (copy on write). When no block is free the engine pre-empts its youngest sequence, which frees its blocks and
is computed again later (Engine.grow).

Only numbers are managed here. The memory itself, and what is in it, belongs to the runner (runner.py).
"""
from collections.abc import Sequence


class BlockManager:
    """
    Blocks 1 .. n_blocks, each of `block` tokens. Block 0 exists too and belongs to nobody: what no sequence will ever
    read is written there.
    """
    def __init__(self, n_blocks: int, block: int):
        self.n_blocks, self.block = n_blocks, block
        self.free_blocks = list(range(n_blocks, 0, -1))             # taken from the end
        self.tables: dict[object, list[int]] = {}                   # sequence -> its blocks, in the order of the text
        self.readers = [0] * (n_blocks + 1)                         # by block: sequences that have it in their table

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that n tokens take."""
        return -(-n_tokens // self.block)

    def allocate(self, key: object, n_tokens: int, shared: Sequence[int] = ()) -> bool:
        """
        A table for a new sequence of n tokens, which begins with the blocks `shared` of another one. False, and nothing
        is taken, when too few are free.
        """
        if self.blocks_for(n_tokens) - len(shared) > len(self.free_blocks):
            return False
        self.tables[key] = list(shared)
        for b in shared:
            self.readers[b] += 1
        return self.append(key, n_tokens)

    def append(self, key: object, n_tokens: int) -> bool:
        """Grow the table of a sequence to n tokens. False, and nothing is taken, when too few blocks are free."""
        table = self.tables[key]
        missing = self.blocks_for(n_tokens) - len(table)
        if missing > len(self.free_blocks):
            return False
        for _ in range(missing):
            b = self.free_blocks.pop()
            self.readers[b] = 1
            table.append(b)
        return True

    def free(self, key: object) -> None:
        """A sequence is gone: its blocks are free, except those that another one reads."""
        for b in reversed(self.tables.pop(key)):
            self.readers[b] -= 1
            if self.readers[b] == 0:
                self.free_blocks.append(b)
