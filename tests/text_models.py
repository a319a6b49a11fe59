"""Text encoders as LiteRT models in a folder, as a bundle has them."""

from tfrec.engines import TextModel
from tfrec.models import litert


def text_model(folder, encoder, int8=False, calibration=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.tflite").write_bytes(litert.text_model(encoder, int8, calibration))
    encoder.settings.write(folder, encoder.width, encoder.tokenizer.length)
    encoder.tokenizer.save(folder / "tokenizer.json")
    return TextModel(folder, threads=1)
