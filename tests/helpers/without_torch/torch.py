"""Stands before PyTorch on the path of programs that tests start: tensorboardX would spend two seconds importing it."""

raise ImportError("hidden from this program")
