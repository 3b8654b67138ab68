"""Make trained neural networks smaller before deployment, knowing from how they were trained where it may cut.

`import compressor` is light, and enough for transformers to load compressed folders. The public names are those of
`__init__.pyi`; torch and the rest of the package are imported when one of them is first used.
"""

import lazy_loader

from compressor.registration import register
from compressor.version import VERSION

__version__ = VERSION
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register()
