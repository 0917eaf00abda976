__version__ = "0.0.1"

import warnings

# fastai still uses it, and nobody who imports relvit can do anything about that
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)
