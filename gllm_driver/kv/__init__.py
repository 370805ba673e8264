"""KV cache bookkeeping: which page belongs to whom. Page contents stay with the backend."""
