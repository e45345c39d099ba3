"""A page and an HTTP API over a meta-trained model: examples in, class probabilities after each inner step out.

Needs ``pip install 'innerloop[serve]'``.
"""

from innerloop.serve.app import create_app
from innerloop.serve.limits import Limits

__all__ = ["Limits", "create_app"]
