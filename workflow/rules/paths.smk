# Where everything goes.


pathvars:
    results=PLAN.config.results,
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",
