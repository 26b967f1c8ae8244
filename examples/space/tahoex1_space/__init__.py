"""What a Space that embeds and annotates cells is made of, but for the page itself."""
