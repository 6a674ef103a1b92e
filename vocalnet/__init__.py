"""VocalNet: a streaming speech LLM."""
