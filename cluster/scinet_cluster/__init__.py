"""Running SCINet on clusters; nothing here yet but the layer: it may know ``scinet``, never the other way round."""
