"""Answer a benchmark with a model and score what came back; the command is src/eval/test_qwen2vl_CVBench.py."""
