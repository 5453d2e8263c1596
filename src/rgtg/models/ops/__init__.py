"""Operations on a loaded model: hidden states, heads, and faster layers for decoding."""
