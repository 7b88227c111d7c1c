"""Text to tokens: sources, tokenizers, shards and the tokenised corpus. Knows no paper and no model."""
