"""`legato bench`, and the same from Python: load a cluster and measure what its clients see.

    settings.py   what was asked for                     traces.py    Mooncake and Azure trace files
    lengths.py    how long prompts and answers are       corpus.py    prompts of our own
    arrivals.py   when requests come, and how long       prompts.py   requests made of real text, to the token
    load.py       sends them: open loop, closed loop     record.py    one request as the load generator saw it
    report.py     records -> figures; the JSON object    quantiles.py exact percentiles
    table.py      for a terminal                         plot.py      for a PNG

Times are seconds after the start of the load by the event loop's monotonic clock.
"""
