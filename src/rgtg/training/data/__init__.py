"""What a training run reads: tokenised data sets, hidden states and pair weights."""
