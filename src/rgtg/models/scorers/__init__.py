"""What scores candidates: reward models, token rewards, heads, adapters."""
