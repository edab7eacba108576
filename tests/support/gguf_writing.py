"""GGUF files for tests, written by llama.cpp's own package."""


def write(path, tensors, raw=()):
    """A GGUF file of plain arrays and of blocks: name → (bytes (rows, width), type)."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    writer.add_block_count(2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    for name, (blocks, kind) in dict(raw).items():
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
