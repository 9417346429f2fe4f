"""What constrains text: JSON schemas, GBNF, Lark and regular expressions become masks of tokens."""
