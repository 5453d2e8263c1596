"""From text and conversations to tokens and back."""
