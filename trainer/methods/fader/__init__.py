"""FADeR: reconstruction by inpainting under one mask, with attenuation gates on the skip features."""
