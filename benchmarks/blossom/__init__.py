"""Does it learn? The BLOSSOM study: schemes, controls and ideas on real data.

Devices are `petalfl.trainer.Trainer`s, the server is `server.federation.Federation` behind its
gateway, and the transport joins them in memory: nothing is trained or aggregated by code of this
package. `python -m benchmarks.blossom --help`; docs/results.md has what was found.
"""
