"""In torch's place on the path of a device's process, which has none.

Where torch is installed, ONNX Runtime's build for training imports it: 2 s of CPU time a process.
"""

raise ImportError("a device has no torch")
