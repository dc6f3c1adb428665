"""Several processes (ranks) that train one network: who they are, what they exchange, and what ends them."""
