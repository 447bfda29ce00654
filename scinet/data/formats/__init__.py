"""One module a source format; each yields samples that the shard writer stores."""
