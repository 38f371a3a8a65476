"""Hugging Face: ``from_pretrained`` of masked and exported models, pruning in a ``Trainer``, and adapters that stay in the kept blocks.

``import blockprune.hf`` registers blockprune with transformers; ``import blockprune`` does not, because it does not import transformers.

    sparse = bp.export.block_sparse(model)
    sparse.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # after import blockprune.hf

| file          | what it holds                                                                                    |
|---------------|--------------------------------------------------------------------------------------------------|
| `checkpoints` | the loader of `from_pretrained`: kept blocks and masks                                           |
| `training`    | `GradualPruning`, a callback of `transformers.Trainer`                                           |
| `adapters`    | `masked_lora_config`: adapters of peft that stay in the kept blocks                              |
| `streaming`   | `prune_checkpoint`: a folder into another, one layer in memory at a time                         |
| `checkpoint_folder`, `pruned_folder`, `streamed_budget` | what it reads, what it writes, and its passes over the dense model |
| `recipe_hash` | a hash that keeps an interrupted call from resuming with another recipe                         |
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError('blockprune.hf uses transformers; install it: pip install "blockprune[lm]"') from error

from blockprune.hf.adapters import masked_lora_config
from blockprune.hf.checkpoints import BlockpruneConfig, BlockpruneQuantizer
from blockprune.hf.streaming import prune_checkpoint
from blockprune.hf.training import GradualPruning

__all__ = ["BlockpruneConfig", "BlockpruneQuantizer", "GradualPruning", "masked_lora_config", "prune_checkpoint"]
