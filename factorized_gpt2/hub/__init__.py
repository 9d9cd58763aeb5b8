"""Models to the Hub. Read `publish`, then `model_card`."""

from ..common.lazy import exporting

__all__ = ["check_access", "publish", "publish_adapter"]
__getattr__ = exporting(__name__, {"repository": ["check_access", "publish", "publish_adapter"]})
