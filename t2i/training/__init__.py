from t2i.training import two_metrics

two_metrics.install()  # before Lightning is imported
