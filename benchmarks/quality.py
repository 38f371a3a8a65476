"""What pruning costs a language model, no repair: perplexity of SmolLM2-135M on held-out articles, by method, pattern and sparsity.

python benchmarks/quality.py      # see benchmarks/smollm.py for what to install
"""

import time
from functools import partial

import smollm
import torch
from timing import machine
from tqdm import tqdm

import blockprune as bp
from blockprune import allocate, collect, metric, statistics

SEED = 0
CELLS = [((16, 16), 0.10), ((16, 16), 0.25), ((1, 16), 0.25), ((1, 1), 0.50)]


def main() -> None:
    torch.manual_seed(SEED)
    print(machine())
    model, tokenizer = smollm.load()
    texts = smollm.articles()
    calibration, held_out = smollm.windows(tokenizer, texts[:-30], 16), smollm.windows(tokenizer, texts[-30:], 8)
    dense = smollm.perplexity(model, held_out)
    print(f"SmolLM2-135M, calibration 16 x 512 tokens, perplexity on 8 x 512 held-out tokens, seed {SEED}; dense {dense:.2f}")
    where = partial(bp.excluding, pattern="lm_head*")
    print(f"\n{'block':8}{'sparsity':>9}{'magnitude':>11}{'Wanda':>9}{'Wanda per row':>15}{'seconds':>9}")
    for block, sparsity in tqdm(CELLS, desc="cells", disable=None):
        start = time.perf_counter()
        rule = where(bp.linears(block))
        data = collect.with_statistics(model, where=rule, statistics=[statistics.input_sq], batches=list(calibration[:, None]), lazy=True)
        magnitude = allocate.per_row(metric.l1(data), sparsity) if block == (1, 1) else allocate.per_layer(metric.l1(data), sparsity)
        scores = metric.wanda(data)
        found = [magnitude, allocate.per_layer(scores, sparsity), allocate.per_row(scores, sparsity)]
        del data, scores
        cells = [smollm.perplexity(bp.apply_masks(model, masks), held_out) for masks in found]
        bp.apply_masks(model, {})
        block_text = "x".join(map(str, block))
        print(
            f"{block_text:8}{sparsity:>9.0%}{cells[0]:>11.1f}{cells[1]:>9.1f}{cells[2]:>15.1f}{time.perf_counter() - start:>9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
