"""Other runtimes beside ours: their tools, their conversions, and a worker process for each.

`openvino.sh`, `llama_cpp.sh` and `transformers.sh` install; conversion.py converts; serve.py runs a worker in that
runtime's own Python, where nothing of ours is imported.
"""
