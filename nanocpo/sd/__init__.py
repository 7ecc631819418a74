"""Public Stable Diffusion weights (1.x, 2.x, XL) as nanocpo's models: the UNet is nanocpo/unet.py,
the rest is here."""
