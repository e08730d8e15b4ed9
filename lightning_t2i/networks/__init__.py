"""Networks behind common interfaces: denoisers, latent codecs and text encoders, in the formats of stock folders."""
