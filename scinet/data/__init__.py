"""From a partly labelled collection to batches; knows no model."""
