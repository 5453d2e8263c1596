"""The file formats: pydantic models that commands hand each other as JSON and JSONL."""
