"""A font for formulas, made from what matplotlib brings along, so that the site needs nothing from elsewhere.

Browsers place subscripts and limits by a font's MATH table, and many systems have no font with one. Here the glyphs are
those of STIX General and the table's constants those of DejaVu Serif, scaled. STIX's licence asks a changed version to
carry another name.
"""

from io import BytesIO
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont, newTable
from fontTools.ttLib.tables import otTables

__all__ = ["NAME", "write"]

NAME = "Specstop Math"
KEPT = (range(0x20, 0x250), range(0x370, 0x400), range(0x2000, 0x2070), range(0x20D0, 0x2400), range(0x25A0, 0x2600),
        range(0x2A00, 0x2B00), range(0x1D400, 0x1D800))  # fmt: skip
PERCENTS = ("ScriptPercentScaleDown", "ScriptScriptPercentScaleDown", "RadicalDegreeBottomRaisePercent")


def write(path: Path) -> None:
    """Write the font as woff; the same matplotlib gives the same bytes."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font, model = TTFont(fonts / "STIXGeneral.ttf", recalcTimestamp=False), TTFont(fonts / "DejaVuSerif.ttf")
    chooser = subset.Subsetter(
        subset.Options(notdef_outline=True, layout_features=[], name_IDs=["*"], drop_tables=["FFTM"])
    )
    chooser.populate(unicodes=[code for codes in KEPT for code in codes])
    chooser.subset(font)
    scale = font["head"].unitsPerEm / model["head"].unitsPerEm
    constants = model["MATH"].table.MathConstants
    for name, value in vars(constants).items():
        if isinstance(value, otTables.MathValueRecord):
            value.Value = round(value.Value * scale)
            value.DeviceTable = None
        elif isinstance(value, int) and name not in PERCENTS:
            setattr(constants, name, round(value * scale))
    table = newTable("MATH")
    table.table = otTables.MATH()
    table.table.Version = 0x00010000
    table.table.MathConstants = constants
    table.table.MathGlyphInfo = table.table.MathVariants = None
    font["MATH"] = table
    for record in font["name"].names:
        if record.nameID in (1, 3, 4, 6, 16):
            record.string = NAME if record.nameID != 6 else NAME.replace(" ", "")
    font.flavor = "woff"
    data = BytesIO()
    font.save(data)
    if not path.exists() or path.read_bytes() != data.getvalue():
        path.write_bytes(data.getvalue())
