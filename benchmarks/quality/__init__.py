"""The release gate: is a guard good enough for typical requests, and not worse than its predecessor?

    python -m benchmarks.quality --model FOLDER --data DIR --out new.json --against shipped.json   minutes to an hour
    python -m benchmarks.quality --quick                                                        seconds, without data

The lists and sentences in this folder are made up for it, and no guard may be trained or calibrated on them.
"""
