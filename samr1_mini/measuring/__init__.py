"""What a run will cost and what it does cost: forecast, rehearsal, benchmarks. Open it before a GPU is rented."""
