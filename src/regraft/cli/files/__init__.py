"""Commands on files of weights, which train and predict nothing."""
