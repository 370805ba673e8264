"""KV shared with other requests and processes through a store: fetched while a request waits, saved as it is computed.

What is fetched becomes pages that the prefix index knows; from there on it is ordinary prefix reuse. Any failure means
that the request computes its KV itself.
"""

from .config import KvSharingConfig
from .sharing import KvSharing

__all__ = ["KvSharing", "KvSharingConfig"]
