"""The aggregator: enrolls devices, runs rounds, averages each shared block over its holders."""
