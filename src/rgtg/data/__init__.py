"""Reading preference pairs, prompts and completions from files, with every bad row named."""
