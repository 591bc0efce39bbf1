"""One page about one or several runs: curves, speed, configs and samples."""
