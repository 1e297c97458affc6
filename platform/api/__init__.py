"""What segadapt does: one function per command, of the same name. `import segadapt` offers all of them."""
