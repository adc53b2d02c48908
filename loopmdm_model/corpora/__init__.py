"""Text corpora, how they are fetched and read, and tokenizers."""
