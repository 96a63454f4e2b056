"""What people call the columns of a table of tweets."""

TEXT_COLUMNS = ("text", "texts", "sentence", "tweet", "本文")
ID_COLUMNS = ("id", "tweet_id", "id_str")
LABEL_COLUMNS = ("label", "labels", "target", "sentiment", "ラベル")
# Between the labels of a row that has several.
MULTI_LABEL_SEPARATOR = "|"
