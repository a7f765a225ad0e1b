"""What `bench_step` compares, one module each: ``train(case, after_step)`` never returns.

A module imports what a device that trains this way would import, and nothing else; `worker`
sees to it that its process holds no other library.
"""
