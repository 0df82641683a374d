"""Documents, and windows of tokens drawn from them."""
