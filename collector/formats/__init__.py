"""Episodes to files and back: one file a format, all over the same rows.

jsonl, parquet, otlp    written and read; nothing is lost on the way
hf                      written: what TRL trains on
langfuse, phoenix, langsmith, openai    read
"""
